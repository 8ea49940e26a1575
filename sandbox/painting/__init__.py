"""The sandbox's pictures: palettes, tools and motifs.  Pillow only, and always the same bytes."""
