"""The life of a guest: requests, core managers, recovery and drift."""
