"""`nohyped`: a service of systemd."""
