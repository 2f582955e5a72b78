"""What a mapped slide is written as: pyramids, polygons, areas, pictures."""
