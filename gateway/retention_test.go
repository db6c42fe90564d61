package gateway

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/config"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// TestRetentionRuns: within an hour after its time an event is gone, and the audit
// log, which is kept for ever, says so.
func TestRetentionRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer func() { _ = w.db.Close() }()
		m, err := newMetrics(nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		s := &Server{store: w.db, log: testLog(t), metrics: m}
		s.cfg.EventRetention = config.Duration(36 * time.Hour)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- s.keepRetention(ctx) }()

		for _, severity := range []wire.Severity{wire.SeverityNormal, wire.SeverityMajor} {
			if err := w.db.Raise(ctx, store.Internal{Severity: severity, Text: string(severity)}); err != nil {
				t.Fatal(err)
			}
		}
		count := func() (events, audits int) {
			t.Helper()
			e, err := w.db.Events(ctx, store.EventFilter{Limit: 10})
			if err != nil {
				t.Fatal(err)
			}
			a, err := w.db.AuditLog(ctx, store.AuditFilter{What: "retention.events", Limit: 10})
			if err != nil {
				t.Fatal(err)
			}
			return len(e), len(a)
		}
		time.Sleep(36 * time.Hour)
		synctest.Wait()
		if events, audits := count(); events != 2 || audits != 0 {
			t.Errorf("%d events before their time, %d entries of the audit log", events, audits)
		}
		time.Sleep(retentionEvery + retentionFirst)
		synctest.Wait()
		if events, audits := count(); events != 1 || audits != 1 {
			t.Errorf("%d events after their time, %d entries of the audit log", events, audits)
		}
		time.Sleep(5 * retentionEvery)
		synctest.Wait()
		if events, audits := count(); events != 1 || audits != 1 {
			t.Errorf("%d events in the end, %d entries of the audit log", events, audits)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
