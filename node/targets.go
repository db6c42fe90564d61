package node

import (
	"context"

	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

// serveTarget serves a stream to a target. This node offers none.
func (in *instance) serveTarget(_ context.Context, target string, s *tunnel.Stream) {
	s.Refuse(tunnel.NotFound, "the node offers no target "+wire.Quotable(target))
}
