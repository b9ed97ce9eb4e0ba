"""Compare methods: trials of one recipe, a store that later runs extend, and a report."""
