"""Guest images and root file systems: recipes, builders, and the store that the system manager reads."""
