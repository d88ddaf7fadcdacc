"""The admin services: what operators do. The gate lets in who may, and records it; the services do it."""
