"""Rewards, the reference's scoring pass, and credit."""
