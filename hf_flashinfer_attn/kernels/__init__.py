"""How attention is computed. Backends never import each other; each takes plain tensors and a ragged layout."""
