"""The life of a guest, from the request to the end; core managers, recovery, drift."""
