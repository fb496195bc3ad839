"""The web page, and the server on loopback that brings it to a user of the manager."""
