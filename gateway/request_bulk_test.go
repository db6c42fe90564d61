package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// asking is a waiting party without a join code of its own: it answers with a
// request of its key, and remembers the verdict.
func (d *desk) asking(name, join string, tags map[string]string) (*applicant, *wire.EnrollVerdict) {
	d.t.Helper()
	id, err := identity.Open(d.t.TempDir(), wire.RoleNode)
	if err != nil {
		d.t.Fatal(err)
	}
	csr, err := id.CSR(false)
	if err != nil {
		d.t.Fatal(err)
	}
	told := new(wire.EnrollVerdict)
	a := &applicant{id: id, bend: func(r *http.Request, w *httptest.ResponseRecorder) bool {
		var err error
		if r.Method == http.MethodGet {
			err = json.NewEncoder(w).Encode(wire.EnrollRequest{Role: wire.RoleNode, ID: id.ID(), Name: name, TokenID: join, Tags: tags, CSR: csr, Versions: wire.OwnVersions})
		} else {
			err = json.NewDecoder(r.Body).Decode(told)
		}
		if err != nil {
			d.t.Error(err)
		}
		return true
	}}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.parties[id.KeyHash()] = a
	return a, told
}

func TestManyRequestsAreDecidedAtOnce(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	const n = bulkAtOnce + 20
	join := mustParse(t, d.join(api.CreateJoin{Manual: true, Tags: map[string]string{"role": "web"}, AllowTags: []string{"env=*"}})).TokenID
	live := d.enrolled(d.join(api.CreateJoin{Name: "web-3"}), "")
	var refs []string
	var parties []*applicant
	for i := range n {
		a, _ := d.asking(fmt.Sprintf("web-%d", i), join, map[string]string{"role": "db", "env": "prod", "own": "x"})
		d.see(a)
		parties = append(parties, a)
	}
	waiting := d.requests(api.RequestPending)
	if len(waiting) != n {
		t.Fatalf("%d requests wait, want %d", len(waiting), n)
	}
	for _, q := range waiting {
		refs = append(refs, q.ID)
		if q.Tags["role"] != "web" || q.Tags["env"] != "prod" || q.Tags["own"] != "" {
			t.Fatalf("the code's tags win, and only allowed ones are taken: %v", q.Tags)
		}
	}
	refs = append(refs, "nobody", refs[0])
	ctx := store.WithActor(t.Context(), store.Actor{Who: "alice", Origin: "test"})
	dry, err := d.decideMany(ctx, verbGrant, api.DecideRequests{Refs: refs, DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := len(d.requests(api.RequestPending)); got != n || d.audited("request.grant") != 1 {
		t.Fatalf("the dry run changed something: %d wait", got)
	}
	out, err := d.decideMany(ctx, verbGrant, api.DecideRequests{Refs: refs})
	if err != nil {
		t.Fatal(err)
	}
	if out.Decided != n-1 || out.Failed != 3 || dry.Decided != out.Decided || dry.Failed != out.Failed {
		t.Errorf("decided %d, failed %d (dry run %d, %d), want %d and 3", out.Decided, out.Failed, dry.Decided, dry.Failed, n-1)
	}
	for i, r := range out.Results {
		switch {
		case r.Ref == "nobody":
			if r.Code != api.CodeNotFound {
				t.Errorf("result %+v", r)
			}
		case i == n+1: // the first one again
			if r.Code != api.CodeNotFound || !strings.Contains(r.Error, "was granted by alice") {
				t.Errorf("result %+v", r)
			}
		case r.Error != "":
			if r.Code != api.CodeNameInUse || r.Request == nil || r.Request.Name != "web-3" || r.Request.State != api.RequestPending {
				t.Errorf("result %+v", r)
			}
		case r.Request.State != api.RequestGranted || r.Request.DecidedBy != "alice":
			t.Errorf("result %+v", r.Request)
		}
	}
	if d.id.Revoked(live.id.KeyHash()) {
		t.Error("the live node gave way without --replace")
	}
	for i, a := range parties {
		d.see(a)
		if q, err := d.store.LastRequest(t.Context(), a.id.KeyHash()); err != nil || (q.State == api.RequestDelivered) == (i == 3) {
			t.Errorf("party %d: %+v %v", i, q, err)
		}
	}
	if _, err := d.decideMany(ctx, verbGrant, api.DecideRequests{}); !api.Is(err, api.CodeInvalid) {
		t.Errorf("no request: %v", err)
	}
}

func TestDryRunOfAGrantLooksAtTheFingerprint(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a, _ := d.asking("a", "", nil)
	d.see(a)
	for _, tc := range []struct {
		refs        []string
		fingerprint string
		decided     int
		code        api.Code
	}{
		{[]string{"a"}, a.id.Fingerprint(), 1, ""},
		{[]string{"a"}, wire.KeyHash("00").Fingerprint(), 0, ""},
		{[]string{"a", "b"}, a.id.Fingerprint(), 0, api.CodeInvalid},
	} {
		out, err := d.decideMany(t.Context(), verbGrant, api.DecideRequests{Refs: tc.refs, Fingerprint: tc.fingerprint, DryRun: true})
		if out.Decided != tc.decided || (err != nil) != (tc.code != "") || err != nil && !api.Is(err, tc.code) {
			t.Errorf("%v with %s: %+v %v", tc.refs, tc.fingerprint, out, err)
		}
	}
}

func TestManyAreDeniedAndDiscarded(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a, toldA := d.asking("a", "", nil)
	b, toldB := d.asking("b", "", nil)
	d.see(a)
	d.see(b)
	if out, err := d.decideMany(t.Context(), verbDeny, api.DecideRequests{Refs: []string{"a"}, Reason: "not ours"}); err != nil || out.Decided != 1 {
		t.Fatalf("%+v %v", out, err)
	}
	if out, err := d.decideMany(t.Context(), verbDiscard, api.DecideRequests{Refs: []string{"b"}}); err != nil || out.Decided != 1 {
		t.Fatalf("%+v %v", out, err)
	}
	*toldB = wire.EnrollVerdict{}
	d.see(a)
	d.see(b)
	if toldA.State != wire.EnrollDenied || toldA.Reason != "not ours" {
		t.Errorf("the denied party is told %+v", toldA)
	}
	if toldB.State != "" {
		t.Errorf("the discarded party is told %+v", toldB)
	}
	for ref, verb := range map[string]string{"a": verbGrant, "b": verbDeny} { // either is final
		if out, err := d.decideMany(t.Context(), verb, api.DecideRequests{Refs: []string{ref}}); err != nil || out.Failed != 1 {
			t.Errorf("%s %s: %+v %v", verb, ref, out, err)
		}
	}
}

// A grant waits for its party for days; one that nobody decides on ends.
func TestGrantReachesAPartyDaysLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t)
		late, told := d.asking("late", "", nil)
		never, _ := d.asking("never", "", nil)
		d.see(late)
		d.see(never)
		if _, err := d.grant(t.Context(), "late", api.Grant{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * 24 * time.Hour)
		if err := d.expire(t.Context()); err != nil {
			t.Fatal(err)
		}
		d.see(late)
		if told.State != wire.EnrollGranted || len(told.Chain) == 0 {
			t.Errorf("told %+v", told)
		}
		if q := d.requests(api.RequestPending); len(q) != 1 {
			t.Errorf("%d requests wait after 20 days, want 1", len(q))
		}
		time.Sleep(requestLife)
		if err := d.expire(t.Context()); err != nil {
			t.Fatal(err)
		}
		if q := d.requests(api.RequestExpired); len(q) != 1 || q[0].Name != "never" {
			t.Errorf("expired %+v", q)
		}
		d.see(never) // it is back: that is another request
		if q := d.requests(api.RequestPending); len(q) != 1 {
			t.Errorf("%d requests wait, want 1", len(q))
		}
	})
}

// TestRequestOutlivesItsCode: a code lives for a day, and requests wait for days. The
// party goes on waiting where it is, so that its grant reaches it at once.
func TestRequestOutlivesItsCode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t)
		code := mustParse(t, d.join(api.CreateJoin{Manual: true, Name: "web", Tags: map[string]string{"role": "web"}}))
		a, told := d.asking("wish", code.TokenID, nil)
		d.see(a)
		time.Sleep(3 * 24 * time.Hour)
		d.see(a)
		if told.State != wire.EnrollPending || told.Code != wire.EnrollTokenExpired || !strings.Contains(told.Reason, "request grant") {
			t.Errorf("told %+v", told)
		}
		q := d.requests("")
		if len(q) != 1 || q[0].State != api.RequestPending || q[0].Code != wire.EnrollTokenExpired || q[0].Name != "web" || q[0].Tags["role"] != "web" {
			t.Fatalf("requests %+v", q)
		}
		late, refused := d.asking("late", code.TokenID, nil) // who shows it now comes too late
		d.see(late)
		if refused.State != wire.EnrollDenied || len(d.requests("")) != 1 {
			t.Errorf("told %+v", refused)
		}
		if _, err := d.grant(t.Context(), "web", api.Grant{}); err != nil {
			t.Fatal(err)
		}
		d.see(a)
		if told.State != wire.EnrollGranted || len(told.Chain) == 0 {
			t.Errorf("told %+v", told)
		}

		// What an operator said of the code counts for those who wait, too.
		code = mustParse(t, d.join(api.CreateJoin{Manual: true}))
		b, told := d.asking("db", code.TokenID, nil)
		d.see(b)
		if err := d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error { return tx.RevokeJoin(ctx, code.TokenID) }); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		d.see(b)
		if told.State != wire.EnrollDenied {
			t.Errorf("told %+v", told)
		}
	})
}

func TestRefusedCertificateIsAFailedRequest(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.party(wire.RoleNode, d.join(api.CreateJoin{}), "web")
	status := http.StatusUnprocessableEntity
	a.bend = func(r *http.Request, w *httptest.ResponseRecorder) bool {
		if r.Method == http.MethodPut {
			http.Error(w, "not mine", status)
		}
		return r.Method == http.MethodPut
	}
	d.see(a)
	if q := d.requests("")[0]; q.State != api.RequestFailed || q.Reason == "" {
		t.Fatalf("request %+v", q)
	}
	status = http.StatusInternalServerError // it tries, and its disk is full
	d.see(a)
	if q := d.requests("")[0]; q.State != api.RequestFailed {
		t.Errorf("request %+v", q)
	}
	a.bend = nil
	d.see(a)
	d.expect(a, enroll.StateEnrolled, "")
	if q := d.requests("")[0]; q.State != api.RequestDelivered || q.Reason != "" {
		t.Errorf("request %+v", q)
	}
}

// TestBadCodeDoesNotEndARequest: a party that waits and comes back with a code that
// is no good is told so, and waits on. Else whoever reaches an RCP could leave one
// request after the other.
func TestBadCodeDoesNotEndARequest(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a, told := d.asking("web", "", nil)
	d.see(a)
	if told.State != wire.EnrollPending {
		t.Fatalf("told %+v", told)
	}
	plain := a.bend
	a.bend = func(r *http.Request, w *httptest.ResponseRecorder) bool {
		if r.Method != http.MethodGet {
			return plain(r, w)
		}
		var req wire.EnrollRequest
		own := httptest.NewRecorder()
		plain(r, own)
		err := json.NewDecoder(own.Body).Decode(&req)
		req.TokenID, req.Token = "nobody's", "secret"
		if err = errors.Join(err, json.NewEncoder(w).Encode(req)); err != nil {
			t.Error(err)
		}
		return true
	}
	for range 2 {
		d.see(a)
		if told.State != wire.EnrollDenied || told.Code != wire.EnrollTokenUnknown {
			t.Fatalf("told %+v", told)
		}
		if q := d.requests(""); len(q) != 1 || q[0].State != api.RequestPending || q[0].Code != wire.EnrollTokenUnknown {
			t.Fatalf("%d requests, %+v", len(q), q[0])
		}
	}
	if _, err := d.grant(t.Context(), "web", api.Grant{}); err != nil {
		t.Fatal(err)
	}
	d.see(a)
	if told.State != wire.EnrollGranted || len(told.Chain) == 0 {
		t.Errorf("told %+v", told)
	}
}

func TestRequestsAreSmall(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	req := &wire.EnrollRequest{Role: wire.RoleNode, ID: wire.NewID(), Versions: wire.OwnVersions, CSR: make([]byte, maxCSR+1)}
	got, err := d.register(t.Context(), wire.HashSPKI([]byte("a")), req, origin{})
	if err != nil || got.state != wire.EnrollDenied || got.code != wire.EnrollBadRequest || len(d.requests("")) != 0 {
		t.Errorf("%+v %v", got, err)
	}
}

// TestOneKeyGetsFewLeaves: a party that has a certificate and comes as one that
// waits, again and again, is given new ones slowly: each is kept and audited.
func TestOneKeyGetsFewLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t)
		a := d.enrolled(d.join(api.CreateJoin{}), "")
		for _, answer := range []func(r *http.Request, w *httptest.ResponseRecorder) bool{
			nil,
			func(r *http.Request, w *httptest.ResponseRecorder) bool {
				if r.Method == http.MethodPut {
					http.Error(w, "no", http.StatusInternalServerError)
				}
				return r.Method == http.MethodPut
			},
		} {
			time.Sleep(2 * retryGranted)
			a.bend = answer
			before := len(d.ca.issued)
			for range 10 * maxLeaves {
				time.Sleep(time.Second / 10)
				d.see(a)
			}
			if n := len(d.ca.issued) - before; n != maxLeaves {
				t.Errorf("%d leaves, want %d", n, maxLeaves)
			}
			time.Sleep(retryGranted)
			d.see(a)
			if n := len(d.ca.issued) - before; n != maxLeaves+1 {
				t.Errorf("%d leaves a minute later, want %d", n, maxLeaves+1)
			}
		}
	})
}
