"""What only MySQL and MariaDB need. `codes` is for every driver, the rest for PyMySQL under gevent."""
