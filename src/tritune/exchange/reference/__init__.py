"""Scripts that let reference libraries answer. Each runs alone, by path, also where tritune is not installed."""
