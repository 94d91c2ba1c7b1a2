"""The map of the house: each room in a line, floor by floor. A room imports only from below.

    methods/        the stages: the private ones, and public pretraining
        fine_tuning         the story of every training script: load, adapt, plan, train, publish
        private_run         its private steps, with images and checkpoints between them
        selection           the story of a selection: score, release with noise, keep, publish
        means               the story of released means: sum, add noise, publish, draw a set
        curation            the story of a curation: votes, noise, publish; keep, or vary and repeat
        relabelling         the story of a relabelling: a private classifier, then new labels
        naming              what that classifier says of images, later, at no cost
        agreement           ... where that is how they were drawn, and which are kept
        labeller            that classifier: linear, of features made white
        rendered            both as an autoencoder gives them back, before that classifier
        kept_sets           the set that a vote or a relabelling leaves
        first_stages        selection and means as stages of a training command
        warm_start          ordinary training on a synthetic set, before the first private step
        stages              what both stories share: their opening and their end
        public_passes       what passes on public noise say of a model first
        planning            from the private rows to a plan: previewed, or reserved in the ledger
        outlook             before anything is spent: a verdict, a plan's price, a replay
        forecast            hours, memory and disk, measured on public noise
        saliency            the scores that private units give to weight matrices (DP-SAPF)
        classes             which class, or prompt, a private row counts towards; rows by unit
        mean_features       features of images, and their sums over private units
        mean_generator      a generator fitted to released means
        central_images      small means of Poisson batches, and images made of them
        moments             second moments of private images, and what one image adds to them
        mixtures            Gaussians, fitted to released moments
        releases            the kinds of release: what each sums, and what is drawn after
        election            what either needs first: the candidates, their cost, their classes
        votes               votes of private images for synthetic ones, and what is kept by them
        choice              which matrices to keep, from noisy scores alone
        saliency_file       saliency.json: what a selection chose; whether a ledger paid for it
        film                images of a run while it trains, from weights that are paid for
        publishing          a run's card, samples and repository; the report of a stage's set
        rehearsal           the story of a rehearsal: trials on public images, the better half kept
        trial               one of them, in a process of its own
        workers             processes for them, one thread each
        stand_in            public images that stand for the private ones
        pretraining         the public stage: autoencoder, then text encoder and denoiser
        public_objectives   what it trains: new models, or those of a base; their losses
        plots               a map of the U-Net with its noisy scores; the curves of a rehearsal
    audit/          what an attacker can prove about a run
        audited_run         the real loop, or a mutant of it, with canaries among the images
        canaries            units whose presence an attacker tries to guess
        auditing            from scores and guesses to a lower bound on epsilon
        replay              the loop with and without one unit, all randomness the same
        watched             its pieces, and what went through them
        mutants             the loop broken on purpose, in the ways that published code is
    evaluation/     are the images good, useful, and does any give someone away?
        measuring           the story of an evaluation
        outputs             where it writes: never among images that others read
        features            feature extractors, and the features of a set
        trained_extractors  networks of one's own to extract them, and what those learned from
        fidelity            how much images look like real ones, seen through an extractor
        downstream          classifiers trained on synthetic images, tested on real ones
        memorisation        nearest neighbours among the private images, and copies of them
        report              report.html
        plots               the pictures of report.html
    sampling/       synthetic images
        batches             prompts to images, a batch at a time
        generation          prompts to images, over processes, into folders
        prompts             the prompts of a set, from what the command line gives
        sources             what images are made from, and the statement that covers them
        shards              the files of a set: one PNG an image, or parquet shards
        rejection           more images than were asked for, of which the most typical stay
        variations          image-to-image with the model that drew a set
        paid_sets           which runs of a ledger paid for a set, and for those very images
        synthetic_sets      a set as a dataset on the Hub, and the privacy that came with it
    hub/            what leaves for the Hugging Face Hub
        upload              exactly the files that are meant, verified first
        collection          the collection that they join, with their epsilon
        failures            what went wrong with the Hub, in a sentence
        cards               model and dataset cards
        privacy_words       a privacy statement in words
        officer             the page for whoever must sign
        pages               HTML pages of one file each
        evaluation_card     a card's section on evaluate.py's figures
    data/           rows to images, captions, latents and losses
        folders             an image folder: its files and classes, as rows
        metadata            the tables of an image folder, as text
        parquet             whether a folder's parquet files all belong to a split
        rows                loading a split; the caption and label of each row
        units               whose each row is: the privacy units
        grey_levels         which levels of a grey of more than 8 bits are black and white
        image_column        the column that holds the images
        images              which images can be read; decoding, cropping, batches, sheets
        private_set         the readable rows with their captions and units
        diagnostics         what the owner of a private set should look at first
        encoded_files       folders of large arrays: whole or absent, mapped
        latent_files        latents and conditioning on disk, encoded once
        latents             units to the losses of their draws
    models/         public pipelines and what trains in them
        pipelines           loading a public pipeline, frozen; its parts and resolution
        placement           where its parts are, and how precise, to train and to draw
        shapes              a pipeline to plan with, whose weights were not downloaded
        drawing             how images are drawn from a model: sampling.json
        families/           what differs between models: an object a family
        processes           how a base was trained to see noise, from its scheduler's config
        denoising           the denoising loss
        text                captions to what conditions a denoiser
        targets             which layers a target pattern names
        lora                LoRA on the denoiser (DP-LoRA, DP-SAPF)
        loda/               LoDA (DP-LoDA): loda.py and pipeline.py travel with each adapter
        own_weights         weights of the model itself (DP-LDM, DP-Diffusion)
        adapters            loading what a training script published
        public_models       small models in Stable Diffusion's layout, and ones of its real shape
    ledger/         what was spent, on record before it is released
        ledger              the append-only file, chained by hashes
        charges             what its records come to: steps, events, and what may join them
        runs                a run: its folder, branch in the ledger, checkpoints, publication
        remembered          which ledgers a private set was charged to, on this machine
        public_sets         images that are known to come from private ones
        bases               base models that are private results, and bring their epsilon along
        reservations        reserve a plan, or find the run to resume
        checkpoints         whole or absent, never with a generator in them
        statement           privacy.json
        verification        does a statement hold? find it, and hold it against its files
        signatures          who stands behind a statement: SSH keys
        checks              what statements, records and checkpoints must satisfy
    privacy/        differential privacy
        training            the one private training loop
        dp_sgd              its pieces: Poisson sampling, clipping, noise
        unit_sums           sums over units, each bounded by itself
        precision           fp32 products in fp32, never in TF32 or bf16
        randomness          secret random numbers: batches, draws and noise
        plan                every number that the privacy of a run depends on
        accounting          epsilon by two accountants, and the noise that fits a budget
        defaults            steps, B, K and rate from public facts, where they are not given
        verdict             can a plan work? its noise against the largest signal
        replace_one         the PRV accountant for replacing one unit
        optimizers          optimizers of the private gradient
        plots               what privacy costs, as pictures
    gradients/      one backward pass to the gradient of every unit
        per_unit_gradients  the engine: which tensors train, and a recording of a pass
        leaves              layers whose per-unit gradients are known, as autograd functions
        lora_leaf           a LoRA layer as one such function
        recording           what a pass found: norms and weighted sums of per-unit gradients
        products            the tensor mathematics of it
        fast_linear         linear layers on a CPU, through oneDNN
        elementwise         activations on a CPU, each number by its value alone
        whole_groups        group norm on a CPU, each image by itself
        short_attention     attention to few keys on a CPU, in fp32 under autocast
    metrics/        modules of `evaluate`, each loadable alone; they import nothing of ours
    arguments/      every option of every script, a dataclass a group; `parsing` reads them
    memory          how much of it something takes, and how many images fit at once
    fetching        one file of a folder, or of a repository on the Hub
    listing         what lies below a folder: files, images, splits; also behind links
    files           names of what a run leaves; files whole or absent, digests, modes
    version         which version of this code made something
    chatter         what libraries say that helps nobody
    errors          how a script ends: a mistake in one sentence, or a clean stop

The way of one image: a row (`data.rows`) is checked and decoded (`data.images`), becomes a latent
and conditioning, once (`data.latent_files`), is sampled into a step (`privacy.dp_sgd`), becomes K
noised draws and their loss (`data.latents`, `models.denoising`), then one gradient
(`gradients`), is clipped, summed and noised (`privacy.dp_sgd`), moves an adapter
(`privacy.training`), which becomes a file and a statement (`ledger.runs`) and a card (`hub.cards`).
"""
