"""Guests as jobs of Slurm: Slurm chooses the host, the host's manager starts the guest on the chosen resources."""
