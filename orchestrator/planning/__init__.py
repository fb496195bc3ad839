"""Which cores, pages and VF a guest gets: pure decisions."""
