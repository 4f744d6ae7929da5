"""Statistics of a data set: counts, lengths, packing and near duplicates."""
