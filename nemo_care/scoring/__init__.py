"""The consistency-likelihood scoring pass over generated groups."""
