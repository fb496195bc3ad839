"""Planning: chooses cores, huge pages and VFs. Pure."""
