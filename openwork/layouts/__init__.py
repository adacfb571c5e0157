"""How a kernel wants a compressed weight in memory. Made when a layer is deployed, never stored."""
