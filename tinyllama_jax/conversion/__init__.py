"""Opens models of other projects, and writes models in the formats of other projects."""
