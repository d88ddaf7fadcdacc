"""Who somebody is: the offline authority, certificates, API keys, and a caller checked against all three."""
