//! The statistics file: Prometheus text in mapped memory, kept current in place.
