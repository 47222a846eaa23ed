"""The `drt` command: app.py holds what its subcommands share, then one file a subcommand: parse, call, show."""
