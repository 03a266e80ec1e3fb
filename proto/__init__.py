"""Wire formats: protobuf messages, gRPC services and the RowSegment."""
