package gateway

import (
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyport/gateway/store"
	"sallyport/internal/local"
	"sallyport/internal/wire"
)

// A certificate authority that ends, or is away, is noticed by nobody until the
// first leaf cannot be renewed. It is said before: by an event, the doctor and
// metrics.

const (
	watchCAEvery = time.Minute
	awayFor      = 10 * time.Minute // an authority that is started again is no news
	overdueFor   = 6 * time.Hour    // of this gateway's own renewal, which is tried each minute
)

// concern is one thing about the certificate authority that operators have to
// know.
type concern struct {
	key      string // of its event
	severity wire.Severity
	text     string
	fix      string // for the doctor
}

// remoteCA is an authority in another process.
type remoteCA interface {
	Away() time.Time                 // since when it does not answer; zero while it does
	Reach(ctx context.Context) error // asks it now
}

// askTime bounds how long the doctor waits for it.
const askTime = 10 * time.Second

const keyCA = "certificate-authority/"

// concerns are those that there can be, in the same order each time. What is
// as it should be has severity normal, and so has, until it lasted for patience,
// what may pass by itself.
func (s *Server) concerns(now time.Time, patience time.Duration) []concern {
	away := concern{keyCA + "away", wire.SeverityNormal, "the certificate authority answers", ""}
	if remote, ok := s.ca.(remoteCA); ok {
		if since := remote.Away(); !since.IsZero() && now.Sub(since) > patience {
			away.severity = wire.SeverityMajor
			away.text = fmt.Sprintf("the certificate authority has not answered since %s: nothing is enrolled, renewed or signed; this gateway's own certificate ends on %s",
				since.UTC().Format(time.RFC3339), s.id.NotAfter().UTC().Format(time.RFC3339))
			away.fix = "see its host and its log; this gateway's log says why"
		}
	}
	own := concern{keyCA + "gateway", wire.SeverityNormal, "this gateway's own certificate ends on " + s.id.NotAfter().UTC().Format(time.RFC3339), ""}
	if due := s.id.RenewAfter(); !due.IsZero() && now.Sub(due) > overdueFor {
		own.severity = wire.SeverityMajor
		if now.After(s.id.NotAfter()) {
			own.severity = wire.SeverityCritical
		}
		own.text += ", and could not be renewed since " + due.UTC().Format(time.RFC3339)
		own.fix = "see the log: the gateway asks its certificate authority once a minute"
	}
	out := []concern{away, own}
	if ca, ok := s.enrolment.issuers(); ok {
		state := ca.State()
		inter := state.Issuing()
		given := concern{keyCA + "issuer", wire.SeverityNormal, "the intermediate that issues here is trusted", ""}
		if problem, way := s.enrolment.issuerFault(); problem != "" {
			given.severity, given.text, given.fix = wire.SeverityCritical, problem+" "+way, way
		}
		out = append(out, given)
		if state.External != "" || state.Signer != "" {
			out = append(out, outside(now, state, patience))
		}
		out = append(out, ending(now, "intermediate", inter, state.External), ending(now, "root", state.RootOf(inter.Key), state.External))
	}
	if s.doors != nil {
		out = append(out, doorsEnding(now, s.doors.ca.Chain()))
	}
	return append(out, s.enrolment.unsigned.concern(now, patience))
}

// outside is a concern when the external CA, or the signer that has the issuing
// key, has signed nothing for some time.
func outside(now time.Time, state wire.CAState, wait time.Duration) concern {
	who, key := "the external CA at "+state.External, "external"
	if state.External == "" {
		who, key = "the signer at "+state.Signer, "signer"
	}
	c := concern{keyCA + key, wire.SeverityNormal, who + " answers", ""}
	if state.Problem == "" || now.Sub(state.Since) < wait {
		return c
	}
	c.severity = wire.SeverityMajor
	if since := state.Since.UTC().Format(time.RFC3339); state.External == "" {
		c.text = fmt.Sprintf("%s has signed nothing since %s: nothing is enrolled, renewed or revoked (%s)", who, since, state.Problem)
		c.fix = "see whether `sallyport run signer` runs there, what its log says, and whether SALLYPORT_SIGNER_USERS names the user of the certificate authority"
	} else {
		c.text = fmt.Sprintf("%s has issued nothing since %s: nothing is enrolled or renewed (%s)", who, since, state.Problem)
		c.fix = "see whether it runs, and what its log says; where it refuses, whether it still has the provisioner that SALLYPORT_PKI_CA_PROVISIONER names, with the key in SALLYPORT_PKI_CA_KEY_FILE"
	}
	return c
}

// doorsEnding is a concern while the intermediate for other programs, or what is
// above it, comes to its end: what it issues lives 30 days. One of our own is
// replaced 90 days before.
func doorsEnding(now time.Time, chain []*x509.Certificate) concern {
	first := slices.MinFunc(chain, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) })
	c := concern{keyCA + "doors", wire.SeverityNormal, "the intermediate for other programs ends on " + first.NotAfter.UTC().Format(time.RFC3339), ""}
	const day = 24 * time.Hour
	switch life, left := first.NotAfter.Sub(first.NotBefore), first.NotAfter.Sub(now); {
	case left <= min(7*day, life/16):
		c.severity = wire.SeverityCritical
	case left <= min(30*day, life/8):
		c.severity = wire.SeverityMajor
	case left <= min(80*day, life/4):
		c.severity = wire.SeverityWarning
	default:
		return c
	}
	c.fix = "`sallyport ca csr --doors` where the certificate authority runs, have the request signed, and `sallyport ca import --doors`"
	c.text += ", and what it issues with it (" + c.fix + ")"
	return c
}

// ending is a concern while an issuer comes to its end: a quarter of its life, or
// 90 days, is time to look at a new one, an eighth or 30 days to have it, since
// leaves are as long as that. A new root has to reach every party, which takes
// longer.
func ending(now time.Time, kind string, i wire.CAIssuer, external string) concern {
	c := concern{keyCA + kind, wire.SeverityNormal, fmt.Sprintf("%s %d ends on %s", kind, i.N, i.NotAfter.UTC().Format(time.RFC3339)), ""}
	if i.NotAfter.IsZero() { // not known here
		return c
	}
	const day = 24 * time.Hour
	long := time.Duration(1)
	if kind == "root" {
		long = 4
	}
	life, left := i.NotAfter.Sub(i.NotBefore), i.NotAfter.Sub(now)
	switch {
	case left <= min(7*day*long, life/16):
		c.severity = wire.SeverityCritical
	case left <= min(30*day*long, life/8):
		c.severity = wire.SeverityMajor
	case left <= min(90*day*long, life/4):
		c.severity = wire.SeverityWarning
	default:
		return c
	}
	c.fix = fmt.Sprintf("`sallyport ca rotate %s`; where the root's key is kept elsewhere, `sallyport ca csr` and `sallyport ca import`", kind)
	if external != "" {
		c.fix = "replace it at the external CA, " + external
	}
	c.text += ": what it issues ends with it, and then nothing is enrolled or renewed (" + c.fix + ")"
	return c
}

// watchCA tells of each concern once, again when it becomes worse, and when it
// is over, until ctx ends.
func (s *Server) watchCA(ctx context.Context) error {
	told := map[string]wire.Severity{}
	tick := time.NewTicker(watchCAEvery)
	defer tick.Stop()
	for {
		if err := s.tellConcerns(ctx, told); err != nil && ctx.Err() == nil {
			s.log.Error("the state of the certificate authority is not told; it is tried again in a minute", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// tellConcerns raises what is not told yet: what stands open is read when the
// gateway starts.
func (s *Server) tellConcerns(ctx context.Context, told map[string]wire.Severity) error {
	all := s.concerns(time.Now(), awayFor)
	for _, gone := range []concern{ // what was told of them ends with them
		{keyCA + "external", wire.SeverityNormal, "no external CA issues here any more", ""},
		{keyCA + "signer", wire.SeverityNormal, "no signer has the issuing key any more", ""},
		{keyCA + "doors", wire.SeverityNormal, "there are no doors any more", ""},
	} {
		if !slices.ContainsFunc(all, func(c concern) bool { return c.key == gone.key }) {
			all = append(all, gone)
		}
	}
	for _, c := range all {
		if _, ok := told[c.key]; !ok {
			before, err := s.standsOpen(ctx, c.key)
			if err != nil {
				return err
			}
			told[c.key] = before
		}
		if c.severity == told[c.key] {
			continue
		}
		if err := s.store.Raise(ctx, store.Internal{Severity: c.severity, Object: "certificate authority", Key: c.key, Text: c.text}); err != nil {
			return err
		}
		told[c.key] = c.severity
	}
	return nil
}

// checkAuthority is what the doctor finds.
func (s *Server) checkAuthority(ctx context.Context) local.Check {
	c := local.Check{Check: "authority", OK: true}
	asked := false
	if remote, ok := s.ca.(remoteCA); ok {
		ctx, cancel := context.WithTimeout(ctx, askTime)
		defer cancel()
		if err := remote.Reach(ctx); err != nil {
			return local.Check{Check: "authority", Detail: err.Error() + ": nothing is issued, renewed or revoked",
				Fix: "see whether `sallyport run pki` runs there, what its log says, and whether SALLYPORT_GATEWAY_PKI names it; what is enrolled works on meanwhile. " +
					"If this gateway was removed there (`sallyport ca gateway list`): stop it, move " + s.id.Dir() + " away, and start it with a new code (`sallyport ca gateway add`) in SALLYPORT_GATEWAY_PKI_CODE_FILE"}
		}
		asked = true
	} else if near, ok := s.ca.(interface {
		Reach(ctx context.Context) error
	}); ok {
		ctx, cancel := context.WithTimeout(ctx, askTime)
		defer cancel()
		_ = near.Reach(ctx) // its state says what came of it
	}
	for _, one := range s.concerns(time.Now(), 0) {
		if asked && one.key == keyCA+"away" { // it has just answered
			one = concern{one.key, wire.SeverityNormal, "the certificate authority answers", ""}
		}
		if one.severity != wire.SeverityNormal {
			return local.Check{Check: "authority", Detail: one.text, Fix: one.fix}
		}
		if one.key != keyCA+"gateway" && one.key != keyCA+"issuer" && one.key != keyCA+"revocations" { // see certificate; and how would it not be
			if c.Detail != "" {
				c.Detail += ", "
			}
			c.Detail += one.text
		}
	}
	return c
}

var (
	descOwnEnd = prometheus.NewDesc("sallyport_gateway_certificate_not_after_seconds", "End of this gateway's own certificate, in Unix time.", nil, nil)
	descCAEnd  = prometheus.NewDesc("sallyport_gateway_ca_not_after_seconds", "End of the certificates of the authority that are trusted, in Unix time.", []string{"kind", "n", "state"}, nil)
	descCAAway = prometheus.NewDesc("sallyport_gateway_ca_away", "1 while a certificate authority in another process does not answer, or an external CA or a signer signs nothing.", nil, nil)
)

// ends are the metrics of what can end.
type ends struct{ s *Server }

// Describe implements [prometheus.Collector].
func (e ends) Describe(ch chan<- *prometheus.Desc) {
	ch <- descOwnEnd
	ch <- descCAEnd
	ch <- descCAAway
}

// Collect implements [prometheus.Collector].
func (e ends) Collect(ch chan<- prometheus.Metric) {
	if end := e.s.id.NotAfter(); !end.IsZero() {
		ch <- prometheus.MustNewConstMetric(descOwnEnd, prometheus.GaugeValue, float64(end.Unix()))
	}
	var state wire.CAState
	if ca, ok := e.s.enrolment.issuers(); ok {
		state = ca.State()
	}
	if remote, ok := e.s.ca.(remoteCA); ok || state.External != "" || state.Signer != "" {
		away := 0.0
		if ok && !remote.Away().IsZero() || state.Problem != "" {
			away = 1
		}
		ch <- prometheus.MustNewConstMetric(descCAAway, prometheus.GaugeValue, away)
	}
	if e.s.doors != nil {
		c := e.s.doors.ca.Chain()[0]
		ch <- prometheus.MustNewConstMetric(descCAEnd, prometheus.GaugeValue, float64(c.NotAfter.Unix()), "doors", "", wire.IssuerIssuing)
	}
	for kind, issuers := range map[string][]wire.CAIssuer{"root": state.Roots, "intermediate": state.Intermediates} {
		for _, i := range issuers {
			if i.State == wire.IssuerIssuing || i.State == wire.IssuerTrusted {
				ch <- prometheus.MustNewConstMetric(descCAEnd, prometheus.GaugeValue, float64(i.NotAfter.Unix()), kind, strconv.Itoa(i.N), i.State)
			}
		}
	}
}
