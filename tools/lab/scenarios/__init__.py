"""One file for each scenario; `lab` has their order. A scenario is told like a story: steps, then what has to hold."""
