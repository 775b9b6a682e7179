package link

import (
	"fmt"
	"sync"
	"testing"

	"ingot/internal/need"
	"ingot/internal/tests"
)

func TestMain(m *testing.M) { tests.Apart(m, tests.Fresh("sysfs", "/sys")) }

// A list that is asked for while interfaces come and go is whole.
func TestListWhileChanging(t *testing.T) {
	need.Root(t)
	need.NetNS(t)
	const there = 40 // pairs: more than fit one message of the kernel's
	for i := range there {
		if _, err := EnsureVeth(fmt.Sprintf("a%d", i), fmt.Sprintf("b%d", i), nil); err != nil {
			t.Fatal(err)
		}
	}
	stop := make(chan struct{})
	var changing sync.WaitGroup
	changing.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := EnsureVeth("come", "go", nil); err != nil {
				t.Error(err)
				return
			}
			if err := Remove("come"); err != nil {
				t.Error(err)
				return
			}
		}
	})
	defer changing.Wait()
	defer close(stop)
	for range 300 {
		all, err := List()
		if err != nil {
			t.Fatal(err)
		}
		if len(all) < 2*there {
			t.Fatalf("%d interfaces of at least %d", len(all), 2*there)
		}
	}
}
