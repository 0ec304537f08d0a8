"""Video datasets: decoding, sampling, annotations, transforms."""
