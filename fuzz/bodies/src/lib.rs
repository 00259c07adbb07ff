//! Bodies of the fuzz targets, callable from ordinary tests.
