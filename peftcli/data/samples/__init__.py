"""Real weights and real data that ship inside public packages: fetched once, checked, converted, kept in the cache."""
