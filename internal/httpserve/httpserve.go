// Package httpserve answers HTTP until it is time to stop.
package httpserve

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"
)

// Until answers on ln until ctx ends, and lets what runs then end within grace. When it
// returns, nothing is answered any more; the error is nil unless ln failed before.
func Until(ctx context.Context, srv *http.Server, ln net.Listener, grace time.Duration) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		if srv.Shutdown(closing) != nil {
			_ = srv.Close() // what did not end in time
		}
	})
	err := srv.Serve(ln)
	if !stop() {
		<-stopped
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	_ = srv.Close() // nobody asks it to stop any more
	return err
}
