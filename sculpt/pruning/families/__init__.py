"""Pattern families: the options of a site, what each keeps and what it costs."""
