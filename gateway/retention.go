package gateway

import (
	"context"
	"fmt"
	"time"

	"sallyport/gateway/store"
)

const (
	// retentionFirst is how long after its start a gateway looks for what is over:
	// first of all it is there for its nodes.
	retentionFirst = time.Minute
	retentionEvery = time.Hour
	// decidedLife is how long a certificate request can be read that expired, or that
	// an operator denied or discarded and whose party has not come back since.
	decidedLife = 90 * 24 * time.Hour
)

// retention is how long one kind of rows is kept.
type retention struct {
	what   string
	life   time.Duration // 0: for ever
	forget func(ctx context.Context, before time.Time, after int64) (n, next int64, err error)
}

func (s *Server) retentions() []retention {
	events := time.Duration(s.cfg.EventRetention)
	return []retention{
		{"events", events, s.store.ForgetEvents},
		{"gaps", events, s.store.ForgetGaps},
		{"actions", time.Duration(s.cfg.ActionRetention), s.store.ForgetActions},
		{"audit", time.Duration(s.cfg.AuditRetention), s.store.ForgetAudit},
		{"requests", decidedLife, s.store.ForgetRequests},
	}
}

// keepRetention drops what was kept long enough, until ctx ends.
func (s *Server) keepRetention(ctx context.Context) error {
	timer := time.NewTimer(retentionFirst)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		for _, r := range s.retentions() {
			if r.life == 0 {
				continue
			}
			if err := s.forget(ctx, r); err != nil && ctx.Err() == nil {
				s.log.Error("what was kept long enough is not dropped; it is tried again in an hour", "what", r.what, "error", err)
			}
		}
		timer.Reset(retentionEvery)
	}
}

// forget drops one kind, with as much rest as work, so that the others have the
// database for at least half of the time. The audit log says how much it was.
func (s *Server) forget(ctx context.Context, r retention) error {
	before := time.Now().Add(-r.life)
	var total, after int64
	var failed error
	for ctx.Err() == nil {
		began := time.Now()
		n, next, err := r.forget(ctx, before, after)
		total += n
		s.metrics.forgotten.WithLabelValues(r.what).Add(float64(n))
		if after, failed = next, err; err != nil || next == 0 {
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Since(began)):
		}
	}
	if total == 0 {
		return failed
	}
	s.log.Info("dropped what was kept long enough", "what", r.what, "rows", total, "before", before.UTC())
	err := s.store.Update(context.WithoutCancel(ctx), func(ctx context.Context, tx *store.Tx) error {
		tx.Audit(ctx, "retention."+r.what, "", fmt.Sprintf("%d from before %s", total, before.UTC().Format(time.RFC3339)))
		return nil
	})
	if failed != nil {
		return failed
	}
	return err
}
