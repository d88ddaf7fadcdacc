"""The appliance around the engine: gateway, control plane, client SDK and command line."""
