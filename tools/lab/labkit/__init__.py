"""The lab's library: the image that guests boot, guests, a pair of nodes in them, and what a scenario may use."""
