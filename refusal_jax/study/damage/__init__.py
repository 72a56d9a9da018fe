"""The stages that measure what removing a study's direction costs."""
