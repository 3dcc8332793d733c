"""Operations of a run: submission, chunking, custom losses, samples."""
