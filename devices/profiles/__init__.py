"""Device profiles: one TOML file a device, and the code that reads them."""
