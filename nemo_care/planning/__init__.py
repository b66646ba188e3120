"""Memory and time of a recipe before it is queued, and its step as a dry run in a fake world."""
