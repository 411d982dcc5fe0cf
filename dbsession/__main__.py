from dbsession.cli import main

raise SystemExit(main())
