package local

import (
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestEventsOfAUserAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		role := &nodeRole{}
		h := handler(role, quiet)
		send := func(uid uint32, text string) *httptest.ResponseRecorder {
			w := httptest.NewRecorder()
			ctx := context.WithValue(t.Context(), userKey{}, uid)
			h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodPost, "/v1/events", strings.NewReader(`{"severity":"normal","text":"`+text+`"}`)))
			return w
		}
		eve, bob := uint32(os.Geteuid())+4711, uint32(os.Geteuid())+4712
		for i := range eventsBurst {
			if w := send(eve, "x"); w.Code != http.StatusOK {
				t.Fatalf("event %d: %d %s", i, w.Code, w.Body)
			}
		}
		w := send(eve, "x")
		if w.Code != http.StatusTooManyRequests || !strings.Contains(w.Body.String(), "try again in 1 s") {
			t.Fatalf("one more: %d %s", w.Code, w.Body)
		}
		if len(role.got) != eventsBurst {
			t.Fatalf("%d events were stored", len(role.got))
		}
		for name, uid := range map[string]uint32{"another user": bob, "root": 0, "the service's user": uint32(os.Geteuid())} {
			if w := send(uid, "x"); w.Code != http.StatusOK {
				t.Errorf("%s: %d %s", name, w.Code, w.Body)
			}
		}
		time.Sleep(time.Second)
		if w := send(eve, strings.Repeat("x", 30<<10)); w.Code != http.StatusOK {
			t.Errorf("a large one after a second: %d %s", w.Code, w.Body)
		}
		if w := send(eve, strings.Repeat("x", 30<<10)); w.Code != http.StatusTooManyRequests {
			t.Errorf("two large ones after a second: %d", w.Code)
		}
	})
}

func TestUsersAreForgottenWhenTheirAllowanceIsWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a allowances
		for uid := range uint32(maxAllowances) {
			if err := a.spend(context.WithValue(t.Context(), userKey{}, uid+100_000), 0); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Minute)
		if err := a.spend(context.WithValue(t.Context(), userKey{}, uint32(99_999)), 0); err != nil || len(a.byUser) != 1 {
			t.Fatalf("%d users are remembered, %v", len(a.byUser), err)
		}
	})
}

// No database takes a NUL in a text.
func TestEventWithNULIsRefused(t *testing.T) {
	role := &nodeRole{}
	h := handler(role, quiet)
	for _, body := range []string{`{"severity":"normal","text":"a\u0000b"}`, `{"severity":"normal","text":"a","key":"\u0000"}`} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/events", strings.NewReader(body)))
		if w.Code != http.StatusBadRequest || !strings.Contains(w.Body.String(), "NUL") {
			t.Errorf("%s: %d %s", body, w.Code, w.Body)
		}
	}
	if len(role.got) != 0 {
		t.Errorf("%d were stored", len(role.got))
	}
}
