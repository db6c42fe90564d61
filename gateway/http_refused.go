package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// Who has no good token is nobody whom the audit log could name, and may come as
// often as he likes. He is counted, and who tries again and again is told of: in the
// log, and by an event that is raised seldom enough for every disk.

const (
	keyTokens  = "api/tokens"
	tellTokens = 5 * time.Minute // is between two events at least
	tellMost   = 5               // sources that one event names
)

// refusals tell of requests without a good token.
type refusals struct {
	db    *store.DB
	count *prometheus.CounterVec
	log   *slog.Logger
	stray *rate.Limiter // of the log
	now   func() time.Time

	mu     sync.Mutex
	last   time.Time // an event was raised
	untold []string  // who was locked out since, the latest ones
	more   int       // of them that are not in untold
}

func newRefusals(db *store.DB, count *prometheus.CounterVec, log *slog.Logger) *refusals {
	return &refusals{db: db, count: count, log: log, stray: rate.NewLimiter(1, 10), now: time.Now}
}

// add notes a request that was not let in. Who brings no token at all does not
// know that he needs one, and is only counted.
func (r *refusals) add(req *http.Request, no *noEntry) {
	r.count.WithLabelValues(no.why).Inc()
	if no.why == noToken || no.why == noAnswer {
		return
	}
	source, what := sourceLabel(sourceOf(req)), "an unknown token"
	if no.token != nil {
		what = tokenLabel(no.token) + ", which is " + no.why
	}
	if (no.wait == 0 || no.locked) && r.stray.Allow() {
		r.log.Warn("api token refused", "source", source, "token", what, "locked_out", no.wait)
	}
	if no.wait == 0 {
		return
	}
	text := r.lockedOut(no.locked, source+" with "+what)
	if text == "" {
		return
	}
	err := r.db.Raise(context.WithoutCancel(req.Context()), store.Internal{Severity: wire.SeverityWarning, Object: "api", Key: keyTokens, Text: text})
	if err != nil {
		r.log.Error("refused api tokens are told in the log only", "text", text, "error", err)
	}
}

// lockedOut returns the text of the event that is due; empty: none.
func (r *refusals) lockedOut(first bool, who string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if first {
		r.untold = append(r.untold, who)
		if len(r.untold) > tellMost {
			r.untold, r.more = r.untold[1:], r.more+1
		}
	}
	now := r.now()
	if len(r.untold) == 0 || !r.last.IsZero() && now.Sub(r.last) < tellTokens {
		return ""
	}
	text := fmt.Sprintf("API tokens that are no good are tried again and again, by %s", strings.Join(r.untold, "; "))
	if r.more > 0 {
		text += fmt.Sprintf("; and by %d others", r.more)
	}
	r.last, r.untold, r.more = now, nil, 0
	return text + " (a token that has ended is replaced by `sallyport token create`)"
}

// sourceLabel is an address where it is one, and its /64 where one host may own that.
func sourceLabel(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}
