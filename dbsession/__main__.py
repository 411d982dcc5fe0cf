from dbsession.watch.cli import main

raise SystemExit(main())
