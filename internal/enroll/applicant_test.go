package enroll_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// party is an applicant whose Run is under way inside a synctest bubble.
type party struct {
	*enroll.Applicant
	id   *identity.Identity
	file string
	stop func() error
	log  *bytes.Buffer
}

func start(t *testing.T, id *identity.Identity, file string, change ...func(*enroll.Config)) *party {
	t.Helper()
	join, err := identity.OpenJoin(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cfg := enroll.Config{Identity: id, Join: join, Name: "web", Tags: map[string]string{"env": "prod"}, Program: "test", Log: slog.New(slog.NewTextHandler(&log, nil))}
	for _, f := range change {
		f(&cfg)
	}
	ctx, cancel := context.WithCancel(t.Context())
	p := &party{Applicant: enroll.New(cfg), id: id, file: file, log: &log}
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	p.stop = func() error { cancel(); return <-done }
	synctest.Wait()
	return p
}

func code(t *testing.T, ca *identitytest.CA, token string, change ...func(*wire.JoinCode)) string {
	t.Helper()
	c := wire.JoinCode{TrustDomain: ca.TrustDomain, Root: wire.KeyOf(ca.Root), Role: wire.RoleNode, Addresses: []string{"rcp.example:9090"}, TokenID: token, Token: token + "-secret"}
	if token == "" {
		c.TokenID, c.Token = "", ""
	}
	for _, f := range change {
		f(&c)
	}
	s, err := c.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func fresh(t *testing.T) *identity.Identity {
	t.Helper()
	id, err := identity.Open(t.TempDir(), wire.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func (p *party) get(t *testing.T) (wire.EnrollRequest, int) {
	t.Helper()
	w := httptest.NewRecorder()
	p.Handler(nil).ServeHTTP(w, httptest.NewRequest(http.MethodGet, wire.PathEnroll, nil))
	var r wire.EnrollRequest
	if w.Code == http.StatusOK {
		if err := json.Unmarshal(w.Body.Bytes(), &r); err != nil {
			t.Fatal(err)
		}
	}
	return r, w.Code
}

func (p *party) put(t *testing.T, v wire.EnrollVerdict) int {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	p.Handler(nil).ServeHTTP(w, httptest.NewRequest(http.MethodPut, wire.PathEnroll, bytes.NewReader(b)))
	return w.Code
}

// A gateway may go on in the session in which it granted the certificate, and
// in no other: what it could ask for before, or elsewhere, is the request.
func TestGatewayGoesOnInTheSessionOfItsGrant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		file := filepath.Join(t.TempDir(), "join")
		put(t, file, code(t, ca, "t1"))
		p := start(t, fresh(t), file)
		mine := p.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }))
		another := p.Handler(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("another session got through") }))
		ask := func(h http.Handler, method, path string, body any) int {
			b, err := json.Marshal(body)
			if err != nil {
				t.Fatal(err)
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(method, path, bytes.NewReader(b)))
			return w.Code
		}
		want := func(when string, h http.Handler, code int) {
			t.Helper()
			for _, path := range []string{wire.PathHello, wire.PathDesired, "/"} {
				if c := ask(h, http.MethodGet, path, nil); c != code {
					t.Errorf("%s: %s answers %d, want %d", when, path, c, code)
				}
			}
		}
		want("before", mine, http.StatusNotFound)
		bad := wire.EnrollVerdict{State: wire.EnrollGranted, Chain: identitytest.NewCA(t).Issue(t, p.id)}
		if c := ask(mine, http.MethodPut, wire.PathEnroll, bad); c != http.StatusUnprocessableEntity {
			t.Errorf("a chain of another authority: %d", c)
		}
		want("after a grant that is no good", mine, http.StatusNotFound)
		if c := ask(mine, http.MethodPut, wire.PathEnroll, wire.EnrollVerdict{State: wire.EnrollPending}); c != http.StatusNoContent {
			t.Errorf("pending: %d", c)
		}
		want("while it waits", mine, http.StatusNotFound)
		if c := ask(mine, http.MethodPut, wire.PathEnroll, wire.EnrollVerdict{State: wire.EnrollGranted, Chain: ca.Issue(t, p.id)}); c != http.StatusNoContent {
			t.Fatalf("grant: %d", c)
		}
		want("after the grant", mine, http.StatusTeapot)
		want("in another session", another, http.StatusNotFound)
		want("of a party that is asked nothing else", p.Handler(nil), http.StatusNotFound)
		set := ca.Revoke(t, 3, p.id.KeyHash())
		if _, err := p.id.ApplyRevocations(set); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		want("when it is revoked", mine, http.StatusNotFound)
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
}

// mayTry tells whether Wait returns within d of the bubble's time.
func (p *party) mayTry(t *testing.T, d time.Duration) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	return p.Wait(ctx) == nil
}

func TestTokenIsGranted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		file := filepath.Join(t.TempDir(), "join")
		put(t, file, code(t, ca, "t1"))
		var kept wire.EnrollVerdict
		p := start(t, fresh(t), file, func(c *enroll.Config) {
			c.OnGrant = func(v wire.EnrollVerdict) error { kept = v; return nil }
		})
		if s := p.Status(); s.State != enroll.StateWaiting || !p.Needed() || p.Ready() == nil {
			t.Fatalf("status %+v", s)
		}
		if !p.mayTry(t, time.Second) {
			t.Fatal("the first attempt waits")
		}
		req, _ := p.get(t)
		if req.Token != "t1-secret" || req.Name != "web" || req.ID != p.id.ID() || req.Tags["env"] != "prod" {
			t.Errorf("request %+v", req)
		}
		if _, key, err := identity.ParseCSR(req.CSR); err != nil || key != p.id.KeyHash() {
			t.Errorf("CSR for %s: %v", key, err)
		}
		granted, decided := p.Granted(), p.Decided()
		set := ca.Revoke(t, 3)
		if c := p.put(t, wire.EnrollVerdict{State: wire.EnrollGranted, Chain: ca.Issue(t, p.id), Installation: "uid", Revocations: &set}); c != http.StatusNoContent {
			t.Fatalf("grant: %d", c)
		}
		<-granted
		<-decided
		if err := p.Ready(); err != nil || p.Needed() || kept.Installation != "uid" {
			t.Errorf("ready %v, needed %v, kept %+v", err, p.Needed(), kept)
		}
		if n, _ := p.id.Revocations(); n != 3 {
			t.Errorf("revocations %d", n)
		}
		// A gateway that comes again may renew, and nothing else: it gets no
		// token, and what it refuses changes nothing.
		if req, c := p.get(t); c != http.StatusOK || req.Token != "" || len(req.Expired) != 3 {
			t.Errorf("an enrolled party answers %d %+v", c, req)
		}
		for _, state := range []string{wire.EnrollPending, wire.EnrollDenied} {
			if c := p.put(t, wire.EnrollVerdict{State: state, Code: wire.EnrollRevoked}); c != http.StatusNoContent || p.Ready() != nil {
				t.Errorf("%s: %d, ready %v", state, c, p.Ready())
			}
		}
		before := p.id.NotAfter()
		if c := p.put(t, wire.EnrollVerdict{State: wire.EnrollGranted, Chain: ca.Issue(t, p.id, identitytest.NotAfter(before.Add(time.Hour)))}); c != http.StatusNoContent || !p.id.NotAfter().After(before) {
			t.Errorf("renewal: %d, until %s", c, p.id.NotAfter())
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
		if strings.Contains(p.log.String(), "secret") {
			t.Errorf("the token is logged: %s", p.log)
		}
		// A missing file is no error once enrolled; the addresses stay known.
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		p = start(t, p.id, file)
		if err := p.Ready(); err != nil || len(p.Addresses()) != 1 || p.Addresses()[0] != "rcp.example:9090" {
			t.Errorf("after restart: %v %v", err, p.Addresses())
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestRefusalWaitsAMinuteOrForAnotherCode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		file := filepath.Join(t.TempDir(), "join")
		put(t, file, code(t, ca, "t1"))
		p := start(t, fresh(t), file)
		denied := wire.EnrollVerdict{State: wire.EnrollDenied, Code: wire.EnrollTokenUsed, Reason: "used up"}
		p.get(t)
		decided := p.Decided()
		p.put(t, denied)
		<-decided
		if s := p.Status(); s.State != enroll.StateDenied || s.Code != wire.EnrollTokenUsed || s.Why() != "denied: used up" || !strings.Contains(p.Ready().Error(), "used up") {
			t.Errorf("status %+v, ready %v", s, p.Ready())
		}
		if _, c := p.get(t); c != http.StatusServiceUnavailable {
			t.Errorf("asked again at once: %d, want 503", c)
		}
		if p.mayTry(t, 58*time.Second) {
			t.Error("tried again within a minute")
		}
		if !p.mayTry(t, 3*time.Second) {
			t.Error("did not try again after a minute")
		}
		p.get(t)
		p.put(t, denied)
		begin := time.Now()
		put(t, file, code(t, ca, "t2"))
		if !p.mayTry(t, 30*time.Second) || time.Since(begin) > 5*time.Second {
			t.Errorf("a replaced code was picked up after %s", time.Since(begin))
		}
		if req, _ := p.get(t); req.Token != "t2-secret" {
			t.Errorf("token %q", req.Token)
		}
		// A refusal of the code before this one comes late and does not count.
		put(t, file, code(t, ca, "t3"))
		time.Sleep(5 * time.Second)
		p.put(t, denied)
		if s := p.Status(); s.State != enroll.StateWaiting {
			t.Errorf("status %+v", s)
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
}

// A party that waits for an operator is asked again after minutes only: given
// another code it leaves, to come back and show that. A code that nobody was
// shown, and one that was refused a moment ago, are no reason.
func TestAnotherCodeIsAReasonToComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		file := filepath.Join(t.TempDir(), "join")
		put(t, file, code(t, ca, "t1"))
		p := start(t, fresh(t), file)
		left := func(token string, want bool) {
			t.Helper()
			gone := make(chan error, 1)
			done := make(chan struct{})
			go enroll.LeaveFor(done, p.Another(), func(cause error) { gone <- cause })
			put(t, file, code(t, ca, token))
			time.Sleep(5 * time.Second)
			close(done)
			synctest.Wait()
			if got := len(gone) == 1; got != want {
				t.Errorf("left for %s: %v, want %v", token, got, want)
			}
		}
		left("t2", false)
		p.get(t)
		p.put(t, wire.EnrollVerdict{State: wire.EnrollPending, Code: wire.EnrollManual, Reason: "an operator has to grant this"})
		left("t2", false)
		left("t3", true)
		p.get(t)
		p.put(t, wire.EnrollVerdict{State: wire.EnrollDenied, Code: wire.EnrollTokenUsed, Reason: "used up"})
		left("t4", true)
		p.get(t)
		left("t3", false)
		if err := p.stop(); err != nil {
			t.Error(err)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		p = start(t, p.id, file) // it knows whom to trust, and has no code any more
		p.get(t)
		p.put(t, wire.EnrollVerdict{State: wire.EnrollPending, Code: wire.EnrollManual, Reason: "an operator has to grant this"})
		left("t5", true)
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
}

// A disk that takes no new code leaves the party with the one it had, and the
// new one is taken as soon as there is room.
func TestNewCodeThatTheDiskRefusesIsTakenLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		file := filepath.Join(t.TempDir(), "join")
		put(t, file, code(t, ca, "t1"))
		p := start(t, fresh(t), file)
		memory := filepath.Join(p.id.Dir(), "join.json")
		if err := os.Remove(memory); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(memory, "in-the-way"), 0o700); err != nil { // no file can be put there
			t.Fatal(err)
		}
		put(t, file, code(t, ca, "t2", func(c *wire.JoinCode) { c.Addresses = []string{"other.example:9090"} }))
		time.Sleep(time.Minute)
		synctest.Wait()
		if req, _ := p.get(t); req.Token != "t1-secret" || p.Addresses()[0] != "rcp.example:9090" {
			t.Errorf("token %q, addresses %v", req.Token, p.Addresses())
		}
		if err := os.RemoveAll(memory); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		if req, _ := p.get(t); req.Token != "t2-secret" || p.Addresses()[0] != "other.example:9090" {
			t.Errorf("token %q, addresses %v", req.Token, p.Addresses())
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
		if n := strings.Count(p.log.String(), "tried again"); n != 1 {
			t.Errorf("it was said %d times", n)
		}
	})
}

func TestManualWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		file := filepath.Join(t.TempDir(), "join")
		put(t, file, code(t, ca, "", func(c *wire.JoinCode) { c.TokenID, c.Name = "manual-1", "db" }))
		p := start(t, fresh(t), file)
		if req, _ := p.get(t); req.Token != "" || req.TokenID != "manual-1" || req.Name != "db" {
			t.Errorf("request %+v", req)
		}
		p.put(t, wire.EnrollVerdict{State: wire.EnrollPending, Code: wire.EnrollNameInUse, Reason: "web is taken"})
		time.Sleep(time.Hour)
		if s := p.Status(); s.State != enroll.StateWaiting || s.Code != wire.EnrollNameInUse {
			t.Errorf("status %+v", s)
		}
		if c := p.put(t, wire.EnrollVerdict{State: "perhaps"}); c != http.StatusUnprocessableEntity {
			t.Errorf("unknown verdict: %d", c)
		}
		foreign := identitytest.NewCA(t)
		if c := p.put(t, wire.EnrollVerdict{State: wire.EnrollGranted, Chain: foreign.Issue(t, p.id)}); c != http.StatusUnprocessableEntity {
			t.Errorf("a chain of another CA: %d", c)
		}
		if c := p.put(t, wire.EnrollVerdict{State: wire.EnrollGranted, Chain: ca.Issue(t, p.id)}); c != http.StatusNoContent || p.Ready() != nil {
			t.Errorf("grant: %d %v", c, p.Ready())
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestRevokedPartyTakesNewKeyWithNewCode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		file := filepath.Join(t.TempDir(), "join")
		put(t, file, code(t, ca, "t1"))
		p := start(t, fresh(t), file)
		p.get(t)
		p.put(t, wire.EnrollVerdict{State: wire.EnrollGranted, Chain: ca.Issue(t, p.id)})
		key, uuid := p.id.KeyHash(), p.id.ID()
		if _, err := p.id.ApplyRevocations(ca.Revoke(t, 1, key)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if s := p.Status(); s.State != enroll.StateRevoked || p.Needed() || p.id.KeyHash() != key {
			t.Errorf("with the old code: %+v, key %s", s, p.id.KeyHash())
		}
		put(t, file, code(t, ca, "t2"))
		time.Sleep(5 * time.Second)
		if s := p.Status(); s.State != enroll.StateWaiting || p.id.KeyHash() == key || p.id.ID() != uuid {
			t.Errorf("with a new code: %+v, key %s", s, p.id.KeyHash())
		}
		if req, _ := p.get(t); req.Token != "t2-secret" || req.ID != uuid {
			t.Errorf("request %+v", req)
		}
		p.put(t, wire.EnrollVerdict{State: wire.EnrollGranted, Chain: ca.Issue(t, p.id)})

		// Removed while it was away: all it sees is that upstreams refuse it.
		key = p.id.KeyHash()
		p.Refused(errors.New("bad certificate"))
		if s := p.Status(); s.State != enroll.StateEnrolled || !strings.Contains(s.Reason, "bad certificate") || p.id.KeyHash() != key {
			t.Errorf("refused without a new code: %+v", s)
		}
		put(t, file, code(t, ca, "t3"))
		time.Sleep(5 * time.Second)
		if s := p.Status(); s.State != enroll.StateWaiting || p.id.KeyHash() == key {
			t.Errorf("refused with a new code: %+v", s)
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestRefusedKeyIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		file := filepath.Join(t.TempDir(), "join")
		put(t, file, code(t, ca, "t1"))
		p := start(t, fresh(t), file)
		key := p.id.KeyHash()
		p.get(t)
		decided := p.Decided()
		set := ca.Revoke(t, 1, key)
		p.put(t, wire.EnrollVerdict{State: wire.EnrollDenied, Code: wire.EnrollRevoked, Reason: "this key is revoked", Revocations: &set})
		<-decided
		if p.id.KeyHash() == key || !p.mayTry(t, 2*time.Minute) {
			t.Errorf("status %+v, the same key: %v", p.Status(), p.id.KeyHash() == key)
		}
		if req, _ := p.get(t); req.Token != "t1-secret" {
			t.Errorf("request %+v", req)
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}

		// An expired one believes the signed set, and waits for a new code.
		id := ca.Party(t, wire.RoleNode, identitytest.NotAfter(time.Now().Add(time.Hour)))
		p = start(t, id, "")
		time.Sleep(2 * time.Hour)
		p.get(t)
		set = ca.Revoke(t, 2, id.KeyHash())
		p.put(t, wire.EnrollVerdict{State: wire.EnrollDenied, Code: wire.EnrollRevoked, Reason: "this key is revoked", Revocations: &set})
		if s := p.Status(); s.State != enroll.StateRevoked || !id.Revoked(id.KeyHash()) {
			t.Errorf("status %+v", s)
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
}

// TestGrantThatWasTakenBack: a party that was removed before it came for its first
// certificate is refused by the RCPs, and told nothing. Another code is for
// another key, also after a restart; the code that it has is not.
func TestGrantThatWasTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		file := filepath.Join(t.TempDir(), "join")
		put(t, file, code(t, ca, "t1"))
		p := start(t, fresh(t), file)
		key, dir := p.id.KeyHash(), p.id.Dir()
		p.get(t)
		p.put(t, wire.EnrollVerdict{State: wire.EnrollPending, Code: wire.EnrollManual, Reason: "wait"})
		p.Refused(errors.New("bad certificate"))
		if s := p.Status(); s.Code != wire.EnrollManual {
			t.Errorf("status %+v; what the gateway said matters more", s)
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}

		again, err := identity.Open(dir, wire.RoleNode)
		if err != nil {
			t.Fatal(err)
		}
		p = start(t, again, file)
		p.Refused(errors.New("bad certificate"))
		time.Sleep(time.Minute)
		if s := p.Status(); p.id.KeyHash() != key || s.State != enroll.StateWaiting || !strings.Contains(s.Reason, "bad certificate") {
			t.Errorf("status %+v, the same key: %v", s, p.id.KeyHash() == key)
		}
		put(t, file, code(t, ca, "t2"))
		time.Sleep(time.Minute)
		second := p.id.KeyHash()
		if s := p.Status(); second == key || !strings.Contains(s.Reason, "key "+p.id.Fingerprint()) {
			t.Errorf("with another code: status %+v, the same key: %v", s, second == key)
		}
		p.Refused(errors.New("bad certificate"))
		time.Sleep(time.Minute)
		if p.id.KeyHash() != second {
			t.Error("one code made two keys")
		}

		// Who is let in after all is not refused: a third code is for the same key.
		p.Accepted(true)
		if s := p.Status(); s.State != enroll.StateWaiting || strings.Contains(s.Reason, "bad certificate") {
			t.Errorf("let in: status %+v", s)
		}
		put(t, file, code(t, ca, "t3"))
		time.Sleep(time.Minute)
		if p.id.KeyHash() != second {
			t.Error("a key that is not refused was replaced")
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestNewCodeAloneChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		file := filepath.Join(t.TempDir(), "join")
		id := ca.Party(t, wire.RoleNode)
		key := id.KeyHash()
		put(t, file, code(t, ca, "t9"))
		p := start(t, id, file)
		time.Sleep(time.Minute)
		if err := p.Ready(); err != nil || id.KeyHash() != key {
			t.Errorf("ready %v, key changed %v", err, id.KeyHash() != key)
		}
		// A code of another gateway does not move an enrolled party.
		put(t, file, code(t, identitytest.NewCA(t), "other"))
		time.Sleep(time.Minute)
		if err := p.Ready(); err != nil || id.TrustDomain() != ca.TrustDomain {
			t.Errorf("ready %v, trust domain %s", err, id.TrustDomain())
		}
		if n := strings.Count(p.log.String(), "is enrolled in"); n != 1 {
			t.Errorf("said %d times, want once: %s", n, p.log)
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestExpiredAsksForRenewalWithTheSameKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		id := ca.Party(t, wire.RoleNode, identitytest.NotAfter(time.Now().Add(time.Hour)))
		p := start(t, id, "")
		time.Sleep(2 * time.Hour)
		if s := p.Status(); s.State != enroll.StateExpired || !p.Needed() || p.Ready() == nil {
			t.Fatalf("status %+v", s)
		}
		req, _ := p.get(t)
		if len(req.Expired) != 3 || req.Token != "" {
			t.Errorf("request %+v", req)
		}
		if c := p.put(t, wire.EnrollVerdict{State: wire.EnrollGranted, Chain: ca.Issue(t, id)}); c != http.StatusNoContent || p.Ready() != nil {
			t.Errorf("renewal: %d %v", c, p.Ready())
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
}

// A gateway may refuse a party whose certificate has ended, beyond the grace: its
// status says so until the gateway says something else, or there is another code.
func TestExpiredIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		file := filepath.Join(t.TempDir(), "join")
		id := ca.Party(t, wire.RoleNode, identitytest.NotAfter(time.Now().Add(time.Hour)))
		p := start(t, id, file)
		time.Sleep(2 * time.Hour)
		expect := func(when string, state enroll.State, reason string) {
			t.Helper()
			time.Sleep(61 * time.Second)
			if s := p.Status(); s.State != state || !strings.Contains(s.Reason, reason) || !p.Needed() || p.Ready() == nil {
				t.Errorf("%s: status %+v", when, s)
			}
			if r, _ := p.get(t); len(r.Expired) != 3 {
				t.Errorf("%s: the request has a chain of %d", when, len(r.Expired))
			}
		}
		verdict := func(v wire.EnrollVerdict) {
			t.Helper()
			p.get(t)
			if c := p.put(t, v); c != http.StatusNoContent {
				t.Errorf("%s: %d", v.State, c)
			}
		}
		verdict(wire.EnrollVerdict{State: wire.EnrollDenied, Code: wire.EnrollByOperator, Reason: "an operator refused"})
		expect("denied", enroll.StateDenied, "an operator refused")
		verdict(wire.EnrollVerdict{State: wire.EnrollPending, Code: wire.EnrollManual, Reason: "an operator has to grant"})
		expect("pending after that", enroll.StateExpired, "an operator has to grant")
		verdict(wire.EnrollVerdict{State: wire.EnrollDenied, Code: wire.EnrollByOperator, Reason: "an operator refused"})
		put(t, file, code(t, ca, "t2")) // it is asked with that at once
		expect("another code", enroll.StateExpired, "waiting for the gateway")
		if r, _ := p.get(t); r.TokenID != "t2" {
			t.Errorf("the request shows code %q", r.TokenID)
		}
		verdict(wire.EnrollVerdict{State: wire.EnrollGranted, Chain: ca.Issue(t, id)})
		if err := p.Ready(); err != nil {
			t.Error(err)
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestBadCodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		file := filepath.Join(t.TempDir(), "join")
		put(t, file, "sp1.garbage")
		if err := start(t, fresh(t), file).stop(); !errors.Is(err, wire.ErrJoinCode) {
			t.Errorf("malformed: %v", err)
		}
		put(t, file, code(t, ca, "t1", func(c *wire.JoinCode) { c.Role = wire.RoleRCP }))
		if err := start(t, fresh(t), file).stop(); !errors.Is(err, wire.ErrJoinRole) {
			t.Errorf("another role: %v", err)
		}
		p := start(t, ca.Party(t, wire.RoleNode), file) // an enrolled one needs none
		if err := p.Ready(); err != nil {
			t.Error(err)
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
		p = start(t, fresh(t), "")
		if s := p.Status(); s.State != enroll.StateNoCode || p.Needed() || !strings.Contains(s.Reason, "SALLYPORT_NODE_JOIN") {
			t.Errorf("without a code: %+v", s)
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
		// A place that is named and holds nothing is named as such.
		for place, want := range map[string]string{filepath.Join(t.TempDir(), "none"): "does not exist", t.TempDir(): "no join code in the directory"} {
			p = start(t, fresh(t), place)
			if s := p.Status(); s.State != enroll.StateNoCode || !strings.Contains(s.Reason, place) || !strings.Contains(s.Reason, want) {
				t.Errorf("%s: %+v", want, s)
			}
			if err := p.stop(); err != nil {
				t.Error(err)
			}
		}
		// Another instance's code is none of this one's business.
		put(t, file, code(t, ca, "t1"))
		p = start(t, fresh(t), file, func(c *enroll.Config) { c.TrustDomain = "other.sallyport" })
		if s := p.Status(); s.State != enroll.StateNoCode {
			t.Errorf("another instance's code: %+v", s)
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestHandlerServesNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		p := start(t, ca.Pending(t, wire.RoleNode), "")
		for _, r := range []*http.Request{
			httptest.NewRequest(http.MethodPost, wire.PathEnroll, nil),
			httptest.NewRequest(http.MethodGet, wire.PathHello, nil),
			httptest.NewRequest(http.MethodPut, wire.PathCertificate, nil),
		} {
			w := httptest.NewRecorder()
			p.Handler(nil).ServeHTTP(w, r)
			if w.Code != http.StatusNotFound && w.Code != http.StatusMethodNotAllowed {
				t.Errorf("%s %s: %d", r.Method, r.URL, w.Code)
			}
		}
		w := httptest.NewRecorder()
		p.Handler(nil).ServeHTTP(w, httptest.NewRequest(http.MethodPut, wire.PathEnroll, io.LimitReader(zeros{}, 100<<20)))
		if w.Code != http.StatusBadRequest {
			t.Errorf("a body of 100 MB: %d", w.Code)
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// No verdict but one with a chain of the pinned root makes a party.
func FuzzVerdict(f *testing.F) {
	ca := identitytest.NewCA(f)
	id := ca.Pending(f, wire.RoleNode)
	a := enroll.New(enroll.Config{Identity: id, Log: slog.New(slog.DiscardHandler)})
	for _, v := range []wire.EnrollVerdict{
		{State: wire.EnrollGranted, Chain: [][]byte{ca.Root.Raw}},
		{State: wire.EnrollDenied, Code: wire.EnrollTokenUsed},
		{State: wire.EnrollPending},
	} {
		b, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		w := httptest.NewRecorder()
		a.Handler(nil).ServeHTTP(w, httptest.NewRequest(http.MethodPut, wire.PathEnroll, bytes.NewReader(b)))
		if _, ok := id.Party(); ok {
			t.Fatalf("enrolled by %s", b)
		}
	})
}
