"""Files of ours: a kill leaves no half of one, and none is trusted when it is read back."""
