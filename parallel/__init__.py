"""Everything that spreads one model over ranks: topology, layout, mesh, communication and the parallel axes."""
