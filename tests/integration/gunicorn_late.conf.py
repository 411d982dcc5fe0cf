"""gunicorn settings of somebody who does not patch at the top of the file: with preload_app, the application is then
imported before gunicorn's gevent worker patches anything."""

from dbsession.gunicorn_hooks import (  # noqa: F401  # for gunicorn
    child_exit,
    post_request,
    post_worker_init,
    when_ready,
    worker_exit,
)

worker_class = "gevent"
graceful_timeout = 5
