"""The command line and the launchers that start ranks."""
