package policy

import (
	"testing"
	"time"
)

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func TestWhatTheOwnerSaysIsOverEverything(t *testing.T) {
	open := Default()
	night, hot, idle, metered := open, open, open, open
	night.Hours = mustHours(t, "22:00-06:00")
	hot.MaxCelsius = 70
	idle.OnlyIdle = true
	metered.OnMetered = MeteredStop
	in := func(d time.Duration) time.Time { return noon.Add(d) }
	pause := Word{Paused: true}
	for what, c := range map[string]struct {
		p          Policy
		r          Readings
		w          Word
		run, begin bool
		code       string
		until      time.Time
	}{
		"nothing holds":         {p: open, run: true, begin: true},
		"paused":                {p: open, w: pause, code: CodePaused},
		"paused for a while":    {p: open, w: Word{Paused: true, Until: in(time.Hour)}, code: CodePaused, until: in(time.Hour)},
		"a pause that is over":  {p: open, w: Word{Paused: true, Until: in(-time.Second)}, run: true, begin: true},
		"finish":                {p: open, w: Word{Finish: true}, run: true, code: CodeFinishing},
		"paused and finish":     {p: open, w: Word{Paused: true, Finish: true}, code: CodePaused},
		"over pause to finish":  {p: open, w: Word{Paused: true, Until: in(-1), Finish: true}, run: true, code: CodeFinishing},
		"other hours":           {p: night, r: Readings{Sure: true}, code: CodeHours, until: in(10 * time.Hour)},
		"its hours":             {p: night, r: Readings{Sure: true, Now: in(11 * time.Hour)}, run: true, begin: true},
		"hours without a clock": {p: night, r: Readings{Now: in(11 * time.Hour)}, code: CodeHours, until: in(11*time.Hour + time.Minute)},
		"paused at other hours": {p: night, w: pause, r: Readings{Sure: true}, code: CodePaused},
		"hot":                   {p: hot, r: Readings{Celsius: new(70.0)}, code: CodeHot},
		"warm":                  {p: hot, r: Readings{Celsius: new(69.9)}, run: true, begin: true},
		"no thermometer":        {p: hot, run: true, begin: true},
		"no bound":              {p: open, r: Readings{Celsius: new(150.0)}, run: true, begin: true},
		"in use":                {p: idle, r: Readings{Others: new(30.0)}, code: CodeInUse},
		"quiet since now":       {p: idle, r: Readings{Others: new(1.0)}, code: CodeInUse, until: in(5 * time.Minute)},
		"load is not known":     {p: idle, code: CodeInUse, until: in(5 * time.Minute)},
		"load does not matter":  {p: open, r: Readings{Others: new(99.0)}, run: true, begin: true},
		"metered, stop":         {p: metered, r: Readings{Metered: time.Hour}, code: CodeMetered, until: in(time.Hour)},
		"metered, run":          {p: open, r: Readings{Metered: time.Hour}, run: true, begin: true},
	} {
		if c.r.Now.IsZero() {
			c.r.Now = noon
		}
		d, _ := c.p.Decide(c.r, c.w, Before{})
		if d.Run != c.run || d.Begin != c.begin || d.Code != c.code || !d.Until.Equal(c.until) {
			t.Errorf("%s: %+v", what, d)
		}
		if (d.Reason == "") != (d.Run && d.Begin) {
			t.Errorf("%s: the reason is %q", what, d.Reason)
		}
	}
}

// TestHysteresis reads the machine every 10 seconds: jobs neither flicker with a
// load nor with a temperature near its bound.
func TestHysteresis(t *testing.T) {
	p := Default()
	p.OnlyIdle, p.IdleMinutes, p.IdlePercent, p.BusyPercent, p.MaxCelsius = true, 1, 20, 50, 70
	type reading struct {
		others, celsius float64
		times           int
		run             bool // at the last of them
		code            string
	}
	var b Before
	now := noon
	for i, c := range []reading{
		{0, 40, 6, false, CodeInUse}, // 50 s of quiet
		{0, 40, 1, true, ""},         // a minute
		{49, 40, 100, true, ""},      // more than idle, not busy
		{90, 40, 3, true, ""},        // 20 s busy
		{49, 40, 1, true, ""},        // and it is over
		{90, 40, 3, true, ""},        //
		{90, 40, 1, false, CodeInUse},
		{30, 40, 100, false, CodeInUse}, // not quiet enough
		{19, 40, 6, false, CodeInUse},
		{25, 40, 1, false, CodeInUse}, // begins anew
		{19, 40, 6, false, CodeInUse},
		{19, 40, 1, true, ""},
		{0, 71, 1, false, CodeHot}, // at once
		{0, 66, 10, false, CodeHot},
		{0, 65, 1, true, ""},
		{0, 69.9, 10, true, ""},
		{0, 70, 1, false, CodeHot},
		{90, 66, 10, false, CodeHot}, // the first of two reasons is told
		{90, 65, 1, false, CodeInUse},
	} {
		var d Decision
		for range c.times {
			d, b = p.Decide(Readings{Now: now, Sure: true, Others: &c.others, Celsius: &c.celsius}, Word{}, b)
			now = now.Add(10 * time.Second)
		}
		if d.Run != c.run || d.Code != c.code {
			t.Fatalf("step %d %+v: %+v", i, c, d)
		}
	}
}

// The first sample of the machine comes some seconds after the agent has started.
func TestJobsDoNotBeginAtTheStartOfABusyMachine(t *testing.T) {
	p := Default()
	p.OnlyIdle = true
	var b Before
	busy := 100.0
	for at := time.Duration(0); at <= 10*time.Minute; at += 10 * time.Second {
		r := Readings{Now: noon.Add(at)}
		if at > 10*time.Second {
			r.Others = &busy
		}
		var d Decision
		if d, b = p.Decide(r, Word{}, b); d.Run || d.Code != CodeInUse {
			t.Fatalf("%s after its start: %+v", at, d)
		}
	}
}

func TestALoadThatNobodyKnowsHoldsNothingUpForever(t *testing.T) {
	p := Default()
	p.OnlyIdle = true
	d, b := p.Decide(Readings{Now: noon}, Word{}, Before{})
	if d.Run {
		t.Error("they run at once")
	}
	if d, b = p.Decide(Readings{Now: noon.Add(5 * time.Minute)}, Word{}, b); !d.Run {
		t.Errorf("after idle_minutes: %+v", d)
	}
	if d, _ = p.Decide(Readings{Now: noon.Add(5*time.Minute + time.Second)}, Word{}, b); !d.Run {
		t.Errorf("and then: %+v", d)
	}
}

func TestAClockThatIsSetBackBeginsTheQuietAnew(t *testing.T) {
	p := Default()
	p.OnlyIdle, p.IdleMinutes = true, 1
	little := 1.0
	_, b := p.Decide(Readings{Now: noon, Others: &little}, Word{}, Before{})
	_, b = p.Decide(Readings{Now: noon.Add(-time.Hour), Others: &little}, Word{}, b)
	if d, _ := p.Decide(Readings{Now: noon.Add(-time.Hour + 59*time.Second), Others: &little}, Word{}, b); d.Run {
		t.Error("59 seconds are taken for a minute")
	}
	if d, _ := p.Decide(Readings{Now: noon.Add(-time.Hour + time.Minute), Others: &little}, Word{}, b); !d.Run {
		t.Error("a minute is no minute")
	}
}

func TestMistakesOfTheOwnerAreNamed(t *testing.T) {
	for what, change := range map[string]func(*Policy){
		"on_metered":   func(p *Policy) { p.OnMetered = "stopp" },
		"busy_percent": func(p *Policy) { p.OnlyIdle, p.BusyPercent = true, 10 },
		"modules":      func(p *Policy) { p.Modules = []string{"abc"} },
		"datasets":     func(p *Policy) { p.Datasets = map[string]string{"a/b": "/x"} },
		"slash":        func(p *Policy) { p.Datasets = map[string]string{"a": "relative"} },
	} {
		p := Default()
		if err := p.Check(); err != nil {
			t.Fatal(err)
		}
		change(&p)
		if p.Check() == nil {
			t.Errorf("%s: no word about it", what)
		}
	}
}

func TestShareIsDivided(t *testing.T) {
	p := Default()
	if p.Share(3) != 0 {
		t.Error("a share without a bound")
	}
	p.CPUPercent = 50
	if one, four := p.Share(1), p.Share(4); one <= 0 || one != 4*four || p.Share(0) != one {
		t.Errorf("%g for one, %g each for four", one, four)
	}
	p.CPUPercent = 100
	if p.Share(1) != 0 {
		t.Error("all of it is a bound")
	}
}
