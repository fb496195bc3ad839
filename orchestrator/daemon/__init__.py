"""What a daemon of systemd needs: journal, notifications, watchdog, HTTP server."""
