"""The embedded data: endless, seeded images with exact truth, and questions about them. Source: ours."""
