package gateway

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/gateway/api"
)

// A list that changes while it is paged through goes on behind the last item
// that was seen, also when that item is no longer in it.
func TestPagesOfAListThatChanges(t *testing.T) {
	list := []string{"a", "b", "c", "d", "e"}
	key := func(s string) string { return s }
	first, err := slicePage(list, Page{Limit: 2}, key)
	if err != nil || !slices.Equal(first.Items, []string{"a", "b"}) {
		t.Fatalf("%v, %v", first, err)
	}
	for _, c := range []struct {
		now, want []string
	}{
		{list, []string{"c", "d"}},
		{[]string{"a", "c", "d", "e"}, []string{"c", "d"}}, // the item at the cursor has left
		{[]string{"bb", "e"}, []string{"bb", "e"}},
		{[]string{"a"}, []string{}},
	} {
		next, err := slicePage(c.now, Page{Cursor: first.Next, Limit: 2}, key)
		if err != nil || !slices.Equal(next.Items, c.want) {
			t.Errorf("of %v: %v, %v; want %v", c.now, next.Items, err, c.want)
		}
	}
	if _, err := slicePage([]string{"e", "a"}, Page{Cursor: first.Next, Limit: 2}, key); err == nil {
		t.Error("a list without order goes on somewhere")
	}
}

// The pages that follow the first are of the same list as long as it is young;
// a first page is always fresh, and so is all of a short list.
func TestNodesArePutTogetherOnceForAllPages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p nodePages
		made := 0
		ask := func(cursor string, limit int) []api.Node {
			all, err := p.nodes(Page{Cursor: cursor, Limit: limit}, func() ([]api.Node, error) {
				made++
				return []api.Node{{Name: fmt.Sprint("made ", made)}, {}, {}}, nil
			})
			if err != nil {
				t.Fatal(err)
			}
			return all
		}
		want := func(what string, all []api.Node, n int) {
			t.Helper()
			if all[0].Name != fmt.Sprint("made ", n) {
				t.Errorf("%s: %s, want %d", what, all[0].Name, n)
			}
		}
		want("short", ask("", 3), 1)
		want("nothing is kept of it", ask("x", 3), 2)
		want("first page", ask("", 1), 3)
		want("second page", ask("x", 1), 3)
		want("another first page", ask("", 1), 4)
		want("its second page", ask("x", 1), 4)
		time.Sleep(pagesLife - time.Second)
		want("nearly too old", ask("y", 1), 4)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		p.mu.Lock()
		kept := p.all
		p.mu.Unlock()
		if kept != nil {
			t.Error("the list is kept although nobody pages through it")
		}
		want("too old", ask("y", 1), 5)
	})
}
